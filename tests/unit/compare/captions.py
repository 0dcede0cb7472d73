"""Captions with the facts that a reader finds in them, written by hand.

Notation: ``modality ct``, ``anatomy lung``, ``nodule present`` (or absent, possible; findings and
devices alike), ``nodule: left``, ``nodule: mild``, ``nodule: 19 mm``.
"""

CAPTIONS: tuple[tuple[str, str], ...] = (
    # Plain statements.
    ("Chest X-ray showing a left pleural effusion.", "modality x-ray | anatomy chest | pleural effusion present | pleural effusion: left"),
    ("CT of the abdomen with a 14 mm cyst in the right kidney.", "modality ct | anatomy abdomen | anatomy kidney | cyst present | cyst: right | cyst: 14 mm"),
    ("Axial T2-weighted MRI demonstrates a mass in the left frontal lobe.", "modality mri | anatomy frontal lobe | mass present | mass: left"),
    ("Ultrasound of the thyroid reveals a 1.9 cm nodule in the right lobe.", "modality ultrasound | anatomy thyroid | nodule present | nodule: right | nodule: 19 mm"),
    ("Mild cardiomegaly.", "cardiomegaly present | cardiomegaly: mild"),
    ("The heart is mildly enlarged.", "cardiomegaly present | cardiomegaly: mild"),
    ("Large right-sided pneumothorax.", "pneumothorax present | pneumothorax: right | pneumothorax: severe"),
    ("Severe hydrocephalus on MRI.", "modality mri | hydrocephalus present | hydrocephalus: severe"),
    ("Compression fracture of the lumbar spine.", "anatomy lumbar spine | compression fracture present"),
    ("There is a stone in the left kidney.", "kidney stone present | kidney stone: left"),
    ("Pacemaker on the left side.", "pacemaker present | pacemaker: left"),
    ("The endotracheal tube tip lies 3 cm above the carina.", "endotracheal tube present | endotracheal tube: 30 mm | anatomy trachea"),
    ("Right internal jugular central venous catheter.", "anatomy jugular vein | central venous catheter present | central venous catheter: right"),
    ("Nasogastric tube in the stomach.", "nasogastric tube present | anatomy stomach"),
    ("A ventriculoperitoneal shunt is noted on the right.", "ventricular shunt present | ventricular shunt: right"),
    ("Pedicle screws are seen on the left.", "pedicle screw present | pedicle screw: left"),
    # Both sides.
    ("Bilateral pleural effusions.", "pleural effusion present | pleural effusion: bilateral"),
    ("Left and right pleural effusions.", "pleural effusion present | pleural effusion: bilateral"),
    ("Left pleural effusion and right pleural effusion.", "pleural effusion present | pleural effusion: bilateral"),
    ("Opacities in both lungs.", "opacity present | opacity: bilateral | anatomy lung"),
    ("Bibasilar atelectasis.", "atelectasis present | atelectasis: bilateral"),
    ("Pleural effusions, right greater than left.", "pleural effusion present | pleural effusion: bilateral"),
    # Measurements.
    ("A 3 x 4 cm mass in the liver.", "mass present | mass: 40 x 30 mm | anatomy liver"),
    ("Hepatic lesion measuring 4.0 cm by 3.0 cm.", "anatomy liver | lesion present | lesion: 40 x 30 mm"),
    ("Renal cyst of 2.3cm.", "anatomy kidney | cyst present | cyst: 23 mm"),
    ("A 19-mm nodule.", "nodule present | nodule: 19 mm"),
    ("The aneurysm is 5.2 centimeters in diameter.", "aneurysm present | aneurysm: 52 mm"),
    ("Lymphadenopathy, nodes of 1 to 2 cm.", "lymphadenopathy present | lymphadenopathy: 10-20 mm | anatomy lymph node"),
    ("There is a nodule. It measures 24 mm.", "nodule present | nodule: 24 mm"),
    ("A two cm gallstone.", "gallstone present | gallstone: 20 mm"),
    ("The common bile duct measures 9 mm.", "anatomy bile duct | bile duct: 9 mm"),
    ("Cystic lesion, 8 mm in diameter, in the left thyroid lobe.", "cyst present | cyst: 8 mm | cyst: left | anatomy thyroid"),
    # Negation.
    ("No pneumothorax.", "pneumothorax absent"),
    ("No evidence of pneumothorax.", "pneumothorax absent"),
    ("Without pleural effusion.", "pleural effusion absent"),
    ("The lungs are free of consolidation.", "anatomy lung | consolidation absent"),
    ("There is no focal consolidation, pleural effusion, or pneumothorax.", "consolidation absent | pleural effusion absent | pneumothorax absent"),
    ("No consolidation, effusion or nodule.", "consolidation absent | pleural effusion absent | nodule absent"),
    ("No large effusion, small nodule or mass.", "pleural effusion absent | pleural effusion: severe | nodule absent | nodule: mild | mass absent"),
    ("Negative for intracranial hemorrhage.", "hemorrhage absent"),
    ("Absence of hydronephrosis.", "hydronephrosis absent"),
    ("Neither ascites nor free air.", "ascites absent | free air absent"),
    ("Pneumothorax is not seen.", "pneumothorax absent"),
    ("Pleural effusion and consolidation are not identified.", "pleural effusion absent | consolidation absent"),
    ("There is a nodule, pneumothorax is not seen.", "nodule present | pneumothorax absent"),
    ("Ascites is absent.", "ascites absent"),
    ("The fracture is no longer visible.", "fracture absent"),
    ("Pulmonary embolism was ruled out.", "embolism absent"),
    ("The heart is not enlarged.", "cardiomegaly absent"),
    ("Goiter or calcification is not present.", "goiter absent | calcification absent"),
    # Where a negation ends.
    ("No pneumothorax, but a small left pleural effusion.", "pneumothorax absent | pleural effusion present | pleural effusion: left | pleural effusion: mild"),
    ("No effusion; 8 mm nodule in the right lung.", "pleural effusion absent | nodule present | nodule: right | nodule: 8 mm | anatomy lung"),
    ("No pneumothorax and a left pacemaker.", "pneumothorax absent | pacemaker present | pacemaker: left"),
    ("No pneumothorax and mild cardiomegaly.", "pneumothorax absent | cardiomegaly present | cardiomegaly: mild"),
    ("No abnormality other than a small nodule.", "abnormality absent | nodule present | nodule: mild"),
    ("No fracture is seen, there is soft tissue swelling.", "fracture absent | swelling present"),
    ("Without hydrocephalus although midline shift is present.", "hydrocephalus absent | midline shift present"),
    ("MRI of the brain without hydrocephalus with a 23 mm mass in the right occipital lobe.", "modality mri | anatomy brain | hydrocephalus absent | mass present | mass: 23 mm | mass: right | anatomy occipital lobe"),
    ("No consolidation. Right effusion.", "consolidation absent | pleural effusion present | pleural effusion: right"),
    # Pseudo-triggers and doubt.
    ("No change in the left pleural effusion.", "pleural effusion present | pleural effusion: left"),
    ("No significant change in the mass.", "mass present"),
    ("No interval increase in the right effusion.", "pleural effusion present | pleural effusion: right"),
    ("Not only a nodule but also a mass.", "nodule present | mass present"),
    ("Pneumonia cannot be excluded.", "pneumonia possible"),
    ("A small pneumothorax cannot be ruled out.", "pneumothorax possible | pneumothorax: mild"),
    ("Possible left lower lobe pneumonia.", "pneumonia possible | pneumonia: left | anatomy lower lobe"),
    ("Findings suspicious for metastasis.", "metastasis possible"),
    ("Cannot exclude a rib fracture.", "fracture possible | anatomy rib"),
    # Normal.
    ("The lungs are clear.", "anatomy lung | abnormality absent"),
    ("Normal chest radiograph.", "abnormality absent | anatomy chest | modality x-ray"),
    ("The right kidney is unremarkable.", "anatomy kidney | abnormality absent | abnormality: right"),
    ("No acute cardiopulmonary disease.", "abnormality absent"),
    # Which finding an attribute belongs to.
    ("Left pneumothorax and right pleural effusion.", "pneumothorax present | pneumothorax: left | pleural effusion present | pleural effusion: right"),
    ("A 12 mm nodule in the left upper lobe and a moderate right effusion.", "nodule present | nodule: 12 mm | nodule: left | anatomy upper lobe | pleural effusion present | pleural effusion: right | pleural effusion: moderate"),
    ("On the right there is a small effusion and on the left a large pneumothorax.", "pleural effusion present | pleural effusion: right | pleural effusion: mild | pneumothorax present | pneumothorax: left | pneumothorax: severe"),
    ("In the left lung there is a nodule.", "nodule present | nodule: left | anatomy lung"),
    ("A cyst is seen in the right kidney and a stone in the left kidney.", "cyst present | cyst: right | anatomy kidney | kidney stone present | kidney stone: left"),
    ("Small bowel obstruction with dilated bowel loops.", "bowel obstruction present | anatomy bowel | dilatation present"),
    ("The left ventricle is dilated.", "anatomy ventricle of the heart | dilatation present"),
    ("Mild to moderate pulmonary edema.", "edema present | edema: mild | edema: moderate"),
    # Longer ones, in the style of figure captions and of reports.
    (
        "Contrast-enhanced CT scan of the abdomen (axial view) showing a hypodense lesion in the liver (arrow) measuring 4.5 x 3.2 cm.",
        "modality ct | anatomy abdomen | anatomy liver | lesion present | lesion: 45 x 32 mm",
    ),
    (
        "PA chest film. The cardiomediastinal silhouette is within normal limits. The lungs are clear without focal consolidation, effusion, or pneumothorax. No acute bony abnormality.",
        "modality x-ray | anatomy chest | anatomy heart | anatomy lung | anatomy bone | abnormality absent | consolidation absent | pleural effusion absent | pneumothorax absent",
    ),
    (
        "Transverse ultrasound image of the left testis showing a 1.2 cm hypoechoic mass with internal vascularity.",
        "modality ultrasound | anatomy testis | mass present | mass: 12 mm | mass: left",
    ),
    (
        "Sagittal T1-weighted MRI of the lumbar spine with severe spinal stenosis and left disc herniation; no compression fracture.",
        "modality mri | anatomy lumbar spine | stenosis present | stenosis: severe | disc herniation present | disc herniation: left | compression fracture absent",
    ),
    (
        "Left panel: CT angiography. There is a filling defect in the right pulmonary artery consistent with pulmonary embolism.",
        "modality ct | modality angiography | anatomy pulmonary artery | thrombosis present | thrombosis: right | embolism present",
    ),
    (
        "Interval placement of a right chest tube; the previously seen pneumothorax has resolved.",
        "chest tube present | chest tube: right | pneumothorax absent",
    ),
)  # fmt: skip


def expected_facts(notation: str) -> set[str]:
    """The notation as a set."""
    return {part.strip() for part in notation.split("|")}
